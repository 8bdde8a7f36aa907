"""The service on Ray Serve: a deployment for each precision, and a router in front of them.

The only package that imports ``ray``, and nothing else imports it.
"""
