"""Bridges to packages that vistok works with and never imports itself."""
