package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
)

// contextParts are the files of a build context, of a MiB each.
const contextParts = 4

// different makes the context of build i, which has no file and no step in common
// with any other, and returns its Dockerfile: three stages, seven steps, about
// 15 MiB of results.
func different(dir, base string, i int) (dockerfile string, err error) {
	random := rand.NewChaCha8([32]byte{byte(i), byte(i >> 8), byte(i >> 16)})
	err = os.MkdirAll(dir, 0o755)
	for n := range contextParts {
		part := make([]byte, mib)
		_, _ = random.Read(part)
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, fmt.Sprintf("part-%d", n)), part, 0o644))
	}
	return fmt.Sprintf(`FROM %[1]s AS tools
RUN mkdir /tools && for n in $(seq 200); do echo %[2]d $n >/tools/$n; done
RUN head -c %[3]d /dev/urandom >/tools/blob && echo %[2]d
FROM %[1]s AS built
COPY . /src
RUN --mount=type=cache,target=/cache cat /src/part-* >/built && echo %[2]d >/cache/last
FROM %[1]s
ENV BUILD=%[2]d
COPY --from=tools /tools /tools
COPY --from=built /built /app
RUN sha256sum /app >/app.sum && rm /tools/1
LABEL build=%[2]d
`, base, i, (1+i%3)*mib), err
}
