"""Tables, charts and HTML pages made from records."""
