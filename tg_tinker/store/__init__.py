"""What lasts: sealed artifacts, their keys, the database and the audit log. No HTTP, no engine."""
