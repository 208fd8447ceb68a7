"""Load tests with locust: of gtcpserver's own servers, and of the user's."""
