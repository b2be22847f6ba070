"""Example plug-ins for isft: filters, a prompt source and an engine."""
