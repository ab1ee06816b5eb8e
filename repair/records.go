package repair

import (
	"context"

	"varve.dev/fsck"
)

// recordRepairs are the repairs of what is wrong with a record, a name or a
// mode, by the invariant. A test compares them with the law.
var recordRepairs = map[string]func(context.Context, *work, fsck.Finding) error{}
