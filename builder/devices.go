package builder

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/entitlements"
	"github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"

	"varve.dev/errdefs"
)

// Annotations of CDI devices that builders read.
const (
	deviceAutoAllow = "org.mobyproject.buildkit.device.autoallow" // needs no grant
	deviceClass     = "org.mobyproject.buildkit.device.class"
)

// devices adds what CDI specifications of this host have for the devices that a
// step asks for.
func (e *execution) devices(asked []*pb.CDIDevice) error {
	if len(asked) == 0 {
		return nil
	}
	cache, err := cdi.NewCache(cdi.WithSpecDirs(e.j.b.CDIDirs...), cdi.WithAutoRefresh(false))
	if err != nil {
		return fmt.Errorf("CDI: %w: %w", err, errdefs.ErrUnavailable)
	}
	var names []string
	for _, d := range asked {
		found := findDevices(cache, d.Name)
		if len(found) == 0 && !d.Optional {
			return fmt.Errorf("required CDI device %q is not registered: %w", d.Name, errdefs.ErrNotFound)
		}
		for _, name := range found {
			if !e.j.deviceAllowed(cache.GetDevice(name), name) {
				return fmt.Errorf("entitlement %s is not allowed: device %s: %w", entitlements.EntitlementDevice, name, errdefs.ErrPermissionDenied)
			}
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	edits := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{Resources: &specs.LinuxResources{}}}
	if _, err := cache.InjectDevices(edits, names...); err != nil {
		return fmt.Errorf("CDI device %s: %w: %w", strings.Join(names, ", "), err, errdefs.ErrUnavailable)
	}
	e.spec.Env = append(e.spec.Env, edits.Process.Env...)
	edits.Process.Env = nil
	e.spec.Edits = edits
	return nil
}

// findDevices are the devices that a name stands for: one, the first or all of a
// kind (KIND, KIND=*), or else those of a class.
func findDevices(cache *cdi.Cache, name string) (out []string) {
	kind, device, _ := strings.Cut(name, "=")
	all := cache.ListDevices()
	for _, full := range all {
		ofKind := strings.HasPrefix(full, kind+"=")
		switch {
		case full == name, ofKind && device == "*":
			out = append(out, full)
		case ofKind && device == "":
			return []string{full}
		}
	}
	var class []string
	for _, full := range all {
		if cache.GetDevice(full).Annotations[deviceClass] == name {
			class = append(class, full)
		}
	}
	if len(out) == 0 {
		return class
	}
	return out
}

// deviceAllowed tells whether a step may have a device.
func (j *job) deviceAllowed(d *cdi.Device, name string) bool {
	if auto, _ := strconv.ParseBool(d.Annotations[deviceAutoAllow]); auto {
		return true
	}
	if auto, _ := strconv.ParseBool(d.GetSpec().Annotations[deviceAutoAllow]); auto {
		return true
	}
	kind, _, _ := strings.Cut(name, "=")
	what := entitlements.EntitlementDevice.String()
	return slices.Contains(j.granted, what) || slices.Contains(j.granted, what+"="+name) || slices.Contains(j.granted, what+"="+kind)
}
