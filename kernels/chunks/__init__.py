"""The recurrences cut into chunks, in plain torch."""
