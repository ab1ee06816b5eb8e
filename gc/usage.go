package gc

import (
	"varve.dev/layout"
)

// Usage is what a store takes of its disk, by what it is for. It is read from
// accounts: making it costs the same whatever the store holds.
type Usage struct {
	Blobs  layout.Usage // whatever they are for
	Layers layout.Usage // likewise
	// Cache is the part of blobs and layers that no image and no container
	// needs: build results, and what operations under way hold.
	Cache layout.Usage
	// CacheMounts are what RUN --mount=type=cache has left, as measured.
	CacheMounts layout.Usage
	// Containers are their writable layers, configurations and logs, as
	// measured; a step that is running has a writable layer too.
	Containers layout.Usage
	Volumes    layout.Usage // as measured
	Quarantine layout.Usage // as measured
	Trash      layout.Usage // removed, and not deleted yet
	Metadata   int64        // bytes of the database and its change log
	Fixed      int64        // bytes of the directories of an empty store
	Unfinished int64        // bytes of downloads that were cut off
	InFlight   int64        // bytes that operations under way have written, or set aside
	Total      int64        // bytes of all of them
	Free       int64        // bytes that the file system still has

	Images, Results, NumContainers int64 // their numbers
}

// Usage tells what the store takes.
func (c *Collector) Usage() Usage {
	all := c.DB.Accounts()
	claimed, _ := c.space.Claimed()
	dir := func(name string) layout.Usage { return all[layout.AccountDir+name] }
	u := Usage{
		Blobs: all[layout.AccountBlobs], Layers: all[layout.AccountLayers],
		Cache:       all[layout.AccountSpareBlobs].Plus(all[layout.AccountSpareLayers]),
		CacheMounts: dir(layout.CacheMountDir), Containers: dir(layout.ActiveDir).Plus(dir(layout.ContainersDir)),
		Volumes: dir(layout.VolumesDir), Quarantine: dir(layout.QuarantineDir), Trash: all[layout.AccountTrash],
		Metadata: c.disk.metadata(), Fixed: c.disk.fixed(), Unfinished: c.Blobs.Unfinished(), InFlight: claimed,
		Images: all[layout.AccountImages].Count, Results: all[layout.AccountCache].Count, NumContainers: all[layout.AccountContainers].Count,
	}
	u.Total = c.taken() - metadataRoom + claimed
	u.Free, _ = c.disk.free()
	return u
}
