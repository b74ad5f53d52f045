"""The demo data set: emoji art of several vendors, aligned on one list of names and a three-level tree."""
