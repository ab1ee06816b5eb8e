package journal

import "context"

// The deleting is paced: so many files a second, whatever else the file system
// has to do. Unlimited, it makes the commits of the file system's own journal
// longer, for which everybody waits who syncs. Somebody who waits for the space
// makes it hurry. docs/design/0008-reclaim.md has what was measured.

const (
	deleteRate = 4000 // files a second
	deleteOnce = 40   // files that may go without a rest between them
)

// next is called before each file is deleted. Its error is the end of ctx.
func (j *Journal) next(ctx context.Context) error {
	if j.inHurry() {
		return ctx.Err()
	}
	return j.pace.Wait(ctx)
}

func (j *Journal) inHurry() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.hurried > 0
}
