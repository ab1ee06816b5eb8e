package buildkit

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"testing/synctest"

	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"

	"varve.dev/builder"
)

// over makes a build that says so much.
func over(t *testing.T, bs *builds, n, output int) {
	t.Helper()
	b, err := bs.begin(&control.SolveRequest{Ref: fmt.Sprint(n)})
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("x"), 64<<10)
	for ; output > 0; output -= len(data) {
		b.tell(&client.SolveStatus{Logs: []*client.VertexLog{{Vertex: digest.FromString("v"), Data: data}}})
	}
	bs.end(b, builder.Response{}, nil)
}

// What is kept of builds that are over is bounded by their number and by what they
// said, and of what nobody listens to nothing is kept.
func TestHistoryIsBounded(t *testing.T) {
	for output, most := range map[int]int{0: keptBuilds, 4 << 20: keptBytes / (8 << 20)} {
		bs := newBuilds()
		over(t, &bs, -1, output)
		if err := bs.update(&control.UpdateBuildHistoryRequest{Ref: "-1", Pinned: true}); err != nil {
			t.Fatal(err)
		}
		for n := range 3 * keptBuilds {
			over(t, &bs, n, output)
			if bs.all[fmt.Sprint(n)] == nil || bs.all["-1"] == nil {
				t.Fatalf("build %d or the pinned one is forgotten", n)
			}
		}
		bytes := 0
		for _, b := range bs.ended {
			bytes += b.bytes()
		}
		if len(bs.ended) > most || len(bs.ended) < most-1 || len(bs.all) != len(bs.ended) || bytes > keptBytes {
			t.Errorf("of builds with %d bytes of output %d and %d are kept, with %d bytes", output, len(bs.ended), len(bs.all), bytes)
		}
		if len(bs.told) != 0 {
			t.Errorf("%d events are kept for nobody", len(bs.told))
		}
	}
}

// Who listens is told of what happens from then on, and nothing is kept when he has
// gone.
func TestHistoryIsTold(t *testing.T) {
	bs := newBuilds()
	over(t, &bs, 1, 0)
	ctx, cancel := context.WithCancel(t.Context())
	var got []string
	err := bs.listen(ctx, &control.BuildHistoryRequest{}, func(e *control.BuildHistoryEvent) error {
		got = append(got, fmt.Sprintf("%s %s", e.Record.Ref, e.Type))
		switch len(got) {
		case 1:
			over(t, &bs, 2, 0)
		case 3:
			cancel()
		}
		return nil
	})
	if want := "[1 COMPLETE 2 STARTED 2 COMPLETE]"; fmt.Sprint(got) != want || err == nil {
		t.Errorf("%v, %v", got, err)
	}
	if bs.listeners != 0 || len(bs.told) != 0 {
		t.Errorf("%d listeners, %d events", bs.listeners, len(bs.told))
	}
}

// Who follows a build is told of its end, whether anybody listens to the history or
// not.
func TestFollowEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bs := newBuilds()
		b, err := bs.begin(&control.SolveRequest{Ref: "one"})
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- bs.follow(t.Context(), "one", func(*client.SolveStatus) error { return nil }) }()
		synctest.Wait()
		bs.end(b, builder.Response{}, nil)
		synctest.Wait()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		default:
			t.Error("the build is over, and who follows it waits")
		}
	})
}
