"""From files to rows that TRL trains on."""
