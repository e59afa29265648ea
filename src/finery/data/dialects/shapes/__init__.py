"""What dialects have in common: calls as JSON, arguments in tags, values written much like JSON."""
