"""MTP drafters: trained heads on either runner, and a target's own modules."""
