"""Elementwise and selective scans."""
