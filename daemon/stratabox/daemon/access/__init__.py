"""Who comes in by the API's door, and what they may do there; knows neither gRPC nor HTTP.

`gate` is what a door uses; `keys` makes and reads keys, `keyring` knows those that there are,
`roles` says what each call takes, `limits` how many calls, `audit` writes them down,
`certificates` holds what TLS needs.
"""
