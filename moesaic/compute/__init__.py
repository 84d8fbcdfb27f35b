"""What router and workers compute alike: products, decoded weights, devices and copies."""
