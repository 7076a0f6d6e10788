"""The data plane beside what one would use otherwise; see __main__.py."""
