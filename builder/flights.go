package builder

import (
	"context"
	"sync"
)

// flights lets one at a time work on a key.
type flights struct {
	mu    *sync.Mutex
	going map[string]chan struct{} // closed at the end
}

func newFlights() flights { return flights{new(sync.Mutex), map[string]chan struct{}{}} }

// do runs fn, or waits for whoever runs it for the same key and then runs it:
// to find the other's result, or to try itself if there is none.
func (f *flights) do(ctx context.Context, key string, fn func() (outputs, error)) (outputs, error) {
	for {
		f.mu.Lock()
		other, busy := f.going[key]
		if !busy {
			mine := make(chan struct{})
			f.going[key] = mine
			f.mu.Unlock()
			out, err := fn()
			f.mu.Lock()
			delete(f.going, key)
			f.mu.Unlock()
			close(mine)
			return out, err
		}
		f.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return outputs{}, ctx.Err()
		}
	}
}
