"""Who may call what, and how much: certificates, keys, tokens, scopes, the log of admin calls, and the limits under load."""
