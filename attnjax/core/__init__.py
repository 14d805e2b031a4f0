"""The engine behind `attnjax.attention`; nothing here is public."""
