package main

import "context"

func usages(ctx context.Context, s settings) error { return nil }
