"""The HTTP server: a front end that knows text, and the engine in a process of its own."""
