package builder

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"strings"

	intoto "github.com/in-toto/in-toto-golang/in_toto"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	solverresult "github.com/moby/buildkit/solver/result"
	"github.com/moby/buildkit/util/attestation"
	"github.com/moby/buildkit/util/purl"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/package-url/packageurl-go"

	"varve.dev/errdefs"
)

// nowhere is the platform of what does not run: attestations.
var nowhere = ocispec.Platform{OS: "unknown", Architecture: "unknown"}

// attestationType is the artifact type of a manifest of attestations.
const attestationType = "application/vnd.docker.attestation.manifest.v1+json"

// provenanceType begins the predicate types that the builder alone may state.
const provenanceType = "https://slsa.dev/provenance/"

// attestations are those of a platform that go into an image.
func (w *writer) attestations(b *built, p exptypes.Platform) []gwclient.Attestation {
	return attestationsOf(b, p, w.o.inline)
}

// attestationsOf leaves out what is only for an image's index unless that is
// asked for.
func attestationsOf(b *built, p exptypes.Platform, inline bool) (out []gwclient.Attestation) {
	for _, a := range b.attests[p.ID] {
		if inline || string(a.Metadata[solverresult.AttestationInlineOnlyKey]) != "true" {
			out = append(out, a)
		}
	}
	return out
}

// attest writes a manifest of attestations of a platform's image.
func (w *writer) attest(ctx context.Context, p *exptypes.Platform, target ocispec.Descriptor, list []gwclient.Attestation) (ocispec.Descriptor, error) {
	var subjects []intoto.Subject
	for _, name := range w.names {
		u, err := purl.RefToPURL(packageurl.TypeDocker, name, &p.Platform)
		if err != nil {
			return target, fmt.Errorf("image name %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		subjects = append(subjects, intoto.Subject{Name: u, Digest: solverresult.ToDigestMap(target.Digest)})
	}
	list, statements, err := w.j.statements(withWritten(ctx, w.layers), list, subjects)
	if err != nil {
		return target, err
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: w.media(ocispec.MediaTypeImageManifest), Layers: []ocispec.Descriptor{}}
	rootfs := ocispec.RootFS{Type: "layers"}
	for i := range list {
		data, err := json.Marshal(statements[i])
		if err != nil {
			return target, fmt.Errorf("attestation: %w: %w", err, errdefs.ErrInternal)
		}
		desc := w.addBytes(intoto.PayloadType, data)
		desc.Annotations = map[string]string{"in-toto.io/predicate-type": statements[i].PredicateType}
		rootfs.DiffIDs = append(rootfs.DiffIDs, desc.Digest)
		m.Layers = append(m.Layers, desc)
	}
	if w.o.artifact {
		m.ArtifactType = attestationType
		m.Subject = &ocispec.Descriptor{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size}
		m.Config = ocispec.DescriptorEmptyJSON
		w.documents = append(w.documents, document{m.Config, m.Config.Data})
	} else {
		config, err := json.Marshal(ocispec.Image{Platform: nowhere, RootFS: rootfs})
		if err != nil {
			return target, fmt.Errorf("attestation: %w: %w", err, errdefs.ErrInternal)
		}
		m.Config = w.addBytes(w.media(ocispec.MediaTypeImageConfig), config)
	}
	desc, err := w.add(m.MediaType, m, append([]ocispec.Descriptor{m.Config}, m.Layers...)...)
	desc.Platform = &nowhere
	desc.Annotations = map[string]string{
		attestation.DockerAnnotationReferenceType:   attestation.DockerAnnotationReferenceTypeDefault,
		attestation.DockerAnnotationReferenceDigest: target.Digest.String(),
	}
	return desc, err
}

// statements takes bundles apart and makes in-toto statements of all.
func (j *job) statements(ctx context.Context, list []gwclient.Attestation, subjects []intoto.Subject) (flat []gwclient.Attestation, out []intoto.Statement, err error) {
	for _, a := range list {
		if a.Ref == nil && a.ContentFunc == nil {
			return nil, nil, fmt.Errorf("attestation does not have available content: %w", errdefs.ErrInvalidArgument)
		}
		switch a.Kind {
		case gwpb.AttestationKind_InToto:
			if a.Path == "" {
				return nil, nil, fmt.Errorf("attestation does not have set path: %w", errdefs.ErrInvalidArgument)
			}
			if strings.HasPrefix(a.InToto.PredicateType, provenanceType) && a.ContentFunc == nil {
				return nil, nil, fmt.Errorf("frontend may not set provenance attestations: %w", errdefs.ErrPermissionDenied)
			}
			flat = append(flat, a)
		case gwpb.AttestationKind_Bundle:
			parts, err := j.unbundle(ctx, a)
			if err != nil {
				return nil, nil, err
			}
			flat = append(flat, parts...)
		}
	}
	flat = coreFirst(flat)
	for _, a := range flat {
		s, err := j.statement(ctx, a, subjects)
		if err != nil {
			return nil, nil, err
		}
		out = append(out, s)
	}
	return flat, out, nil
}

// coreFirst puts the bills of the image itself before those of what it was
// built with.
func coreFirst(list []gwclient.Attestation) (out []gwclient.Attestation) {
	var rest []gwclient.Attestation
	for _, a := range list {
		core, ok := a.Metadata[solverresult.AttestationSBOMCore]
		if name, _, _ := strings.Cut(path.Base(a.Path), "."); ok && name == string(core) {
			out = append(out, a)
		} else {
			rest = append(rest, a)
		}
	}
	return append(out, rest...)
}

// maxAttestation bounds one attestation.
const maxAttestation = 80 << 20

func (j *job) statement(ctx context.Context, a gwclient.Attestation, self []intoto.Subject) (s intoto.Statement, err error) {
	var content []byte
	if a.ContentFunc != nil {
		content, err = a.ContentFunc(ctx)
	} else {
		content, err = a.Ref.ReadFile(ctx, gwclient.ReadRequest{Filename: a.Path})
	}
	if err != nil {
		return s, fmt.Errorf("attestation %s: %w", a.Path, err)
	}
	about := a.InToto.Subjects
	if len(about) == 0 {
		about = []solverresult.InTotoSubject{{Kind: gwpb.InTotoSubjectKind_Self}}
	}
	subjects := []intoto.Subject{}
	for _, x := range about {
		switch x.Kind {
		case gwpb.InTotoSubjectKind_Self:
			for _, me := range self {
				subjects = append(subjects, me)
				if x.Name != "" && x.Name != "_" {
					subjects = append(subjects, intoto.Subject{Name: x.Name, Digest: me.Digest})
				}
			}
		case gwpb.InTotoSubjectKind_Raw:
			name := x.Name
			if name == "" {
				name = "_"
			}
			subjects = append(subjects, intoto.Subject{Name: name, Digest: solverresult.ToDigestMap(x.Digest...)})
		default:
			return s, fmt.Errorf("attestation %s: subject kind %v is not known here: %w", a.Path, x.Kind, errdefs.ErrInvalidArgument)
		}
	}
	s = intoto.Statement{
		StatementHeader: intoto.StatementHeader{Type: intoto.StatementInTotoV1, PredicateType: a.InToto.PredicateType, Subject: subjects},
		Predicate:       json.RawMessage(content),
	}
	if len(content) == 0 {
		s.Predicate = json.RawMessage(nil)
	}
	return s, nil
}

// unbundle makes attestations of the statements in a directory.
func (j *job) unbundle(ctx context.Context, a gwclient.Attestation) (out []gwclient.Attestation, err error) {
	if a.Ref == nil || a.ContentFunc != nil {
		return nil, fmt.Errorf("no ref provided for attestation bundle: %w", errdefs.ErrInvalidArgument)
	}
	entries, err := a.Ref.ReadDir(ctx, gwclient.ReadDirRequest{Path: a.Path})
	if err != nil {
		return nil, fmt.Errorf("attestation bundle: %w", err)
	}
	for _, e := range entries {
		name := path.Join(a.Path, e.Path)
		data, err := a.Ref.ReadFile(ctx, gwclient.ReadRequest{Filename: name, Range: &gwclient.FileRange{Length: maxAttestation}})
		if err != nil {
			return nil, fmt.Errorf("attestation bundle: %w", err)
		}
		var s intoto.Statement
		if err := json.Unmarshal(data, &s); err != nil {
			return nil, fmt.Errorf("attestation %s: cannot decode in-toto statement: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		if want := a.InToto.PredicateType; want != "" && s.PredicateType != want {
			return nil, fmt.Errorf("bundle entry %s does not match required predicate type %s: %w", s.PredicateType, want, errdefs.ErrInvalidArgument)
		}
		if strings.HasPrefix(s.PredicateType, provenanceType) {
			return nil, fmt.Errorf("frontend may not bundle provenance attestations: %w", errdefs.ErrPermissionDenied)
		}
		predicate, err := json.Marshal(s.Predicate)
		if err != nil {
			return nil, fmt.Errorf("attestation %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		part := gwclient.Attestation{
			Kind: gwpb.AttestationKind_InToto, Metadata: a.Metadata, Path: name,
			ContentFunc: func(context.Context) ([]byte, error) { return predicate, nil },
			InToto:      solverresult.InTotoAttestation{PredicateType: s.PredicateType},
		}
		for _, x := range s.Subject {
			var sums []digest.Digest
			sums = append(sums, solverresult.FromDigestMap(x.Digest)...)
			part.InToto.Subjects = append(part.InToto.Subjects, solverresult.InTotoSubject{Kind: gwpb.InTotoSubjectKind_Raw, Name: x.Name, Digest: sums})
		}
		out = append(out, part)
	}
	return out, nil
}
