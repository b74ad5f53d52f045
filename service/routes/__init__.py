"""The HTTP routes, a file an area; each is a thin layer between a request and the service behind it."""
