"""Data that the recipes of this repository train on: fact sheets and dictionary entries, made from public sources."""
