"""What training stages share, and the stages beyond the original: sharper decoder, denoiser.

Imports the core up to `modules`; never `train`.
"""
