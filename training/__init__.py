"""The offline app: recipes that make encoders (`python -m training`)."""
