"""Measure or estimate an artifact: AI Hub, phone, this computer, from its structure; DRAM traffic."""
