"""`dbrx serve`: one loaded model for many clients, in OpenAI's protocol. docs/server.md has the endpoints."""
