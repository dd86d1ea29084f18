"""The migration channel: what the compiled part decodes, records and relays."""
