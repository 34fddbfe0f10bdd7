"""One decoded token: of a recurrence, of a whole layer, of a window, of kept keys."""
