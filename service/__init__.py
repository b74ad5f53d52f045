"""The app: HTTP around a Classifier (`python -m service`)."""
