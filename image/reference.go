package image

import (
	"fmt"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"varve.dev/errdefs"
)

// Ref is the name of an image in a registry, in full and canonical:
// "docker.io/library/busybox:latest", or with a digest in place of the tag or
// behind it.
type Ref struct{ named reference.Named }

// ParseRef reads what people write, by docker's rules: "busybox" is
// "docker.io/library/busybox:latest". Errors: ErrInvalidArgument.
func ParseRef(s string) (Ref, error) {
	named, err := reference.ParseDockerRef(s)
	if err != nil {
		return Ref{}, fmt.Errorf("image name %q: %w: %w", s, err, errdefs.ErrInvalidArgument)
	}
	return Ref{named}, nil
}

// String is the full name. ParseDockerRef drops a tag that stands before a
// digest, since the digest decides.
func (r Ref) String() string { return r.named.String() }

// Familiar is the short form for people: "busybox:latest".
func (r Ref) Familiar() string { return reference.FamiliarString(r.named) }

// FamiliarRepository is the short form without tag and digest.
func (r Ref) FamiliarRepository() string { return reference.FamiliarName(r.named) }

// Domain is the registry as it stands in the name.
func (r Ref) Domain() string { return reference.Domain(r.named) }

// Repository is the name without tag and digest.
func (r Ref) Repository() string { return r.named.Name() }

// Path is the repository without the domain.
func (r Ref) Path() string { return reference.Path(r.named) }

// Tag is the tag, or "" where a digest stands in its place.
func (r Ref) Tag() string {
	if tagged, ok := r.named.(reference.Tagged); ok {
		return tagged.Tag()
	}
	return ""
}

// Digest is the digest, or "".
func (r Ref) Digest() digest.Digest {
	if digested, ok := r.named.(reference.Digested); ok {
		return digested.Digest()
	}
	return ""
}

// WithDigest is the same repository at a digest.
func (r Ref) WithDigest(d digest.Digest) Ref {
	named, err := reference.WithDigest(reference.TrimNamed(r.named), d)
	if err != nil {
		return r // d came from a descriptor that was validated
	}
	return Ref{named}
}

// isID tells whether s may be (the beginning of) an image's id: hex digits,
// with or without "sha256:", that are no name of an image in the store.
func isID(s string) (hex string, ok bool) {
	hex = strings.TrimPrefix(s, digest.SHA256.String()+":")
	if len(hex) < minIDPrefix || len(hex) > 64 {
		return "", false
	}
	for _, c := range hex {
		if !strings.ContainsRune("0123456789abcdef", c) {
			return "", false
		}
	}
	return hex, true
}

// minIDPrefix is how much of an id has to be given, so that a short name of
// hex letters ("cafe") is looked up as a name first and an id is unambiguous
// in practice.
const minIDPrefix = 4
