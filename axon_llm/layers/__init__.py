"""The four kinds of layer a decoder is made of: normalisation, rotary positions, attention, feed-forward."""
