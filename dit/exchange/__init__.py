"""Exchange with the tools of others: trained networks in and out, images out, in the formats that this field uses."""
