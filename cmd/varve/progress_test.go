package main

import (
	"testing"
	"time"

	"varve.dev/api/varve"
)

func TestSpeed(t *testing.T) {
	for _, c := range []struct {
		done, total int64
		since       time.Duration
		want        string
	}{
		{300e6, 900e6, 10 * time.Second, ", 30MB/s, 20s left"},
		{900e6, 900e6, 10 * time.Second, ", 90MB/s, 0s left"},
		{300e6, 900e6, time.Second, ""}, // too early to tell
		{0, 900e6, time.Minute, ""},
		{901e6, 900e6, time.Minute, ""}, // more than was thought
	} {
		if got := speed(varve.Event{Current: c.done, Total: c.total}, c.since); got != c.want {
			t.Errorf("%d of %d in %v: %q, want %q", c.done, c.total, c.since, got, c.want)
		}
	}
}
