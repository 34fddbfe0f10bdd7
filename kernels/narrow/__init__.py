"""The recurrence of Mamba-2 with narrow states, and what lies around it."""
