package main

import "context"

func sweeps(ctx context.Context, s settings) error { return nil }
