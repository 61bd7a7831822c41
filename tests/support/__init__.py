"""What tests share: tiny models, small runs, a browser."""
