"""Faster norm and rotary positions on CPUs, equal to the plain forms."""
