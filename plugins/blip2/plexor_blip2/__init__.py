"""BLIP-2: pictures to tokens, a vision tower and a Q-Former in front of another plugin's language model."""
