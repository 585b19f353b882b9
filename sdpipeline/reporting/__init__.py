"""Reports, contact sheets, exports, and the checks of finished pictures."""
