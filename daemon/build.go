package daemon

import (
	"context"

	"varve.dev/api/varve"
)

// Build implements varve.Builder.
func (e *Engine) Build(ctx context.Context, req varve.BuildRequest, files varve.BuildContext, progress func(varve.Event)) (varve.BuildResult, error) {
	return varve.BuildResult{}, errLater
}
