"""Parts of the solver's bench: its accuracy, and a refresh compared with an earlier version."""
