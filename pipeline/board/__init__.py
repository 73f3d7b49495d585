"""`unclip board`: the report of a whole store, served from this machine while jobs run."""
