"""The journal: every completed call, durable before its result is used."""
