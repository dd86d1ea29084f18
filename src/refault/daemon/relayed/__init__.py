"""One relayed migration: from the pump's word to close or hold."""
