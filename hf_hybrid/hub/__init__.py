"""Repositories for the Hub: model cards, exports, saving and pushing."""
