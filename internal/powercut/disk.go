package powercut

import "sync"

// blockSize is the unit in which disks keep and share their contents.
const blockSize = 4096

// Disk is a block device's contents in memory: zeros, or those of the disk it
// is a fork of, and what was written since. Its methods may be called at
// once. A disk that has forks must not be written to.
type Disk struct {
	size   int64
	parent *Disk

	mu     sync.RWMutex
	blocks map[int64]*[blockSize]byte
}

// NewDisk returns a disk of zeros. size is in bytes, a multiple of 4096.
func NewDisk(size int64) *Disk {
	return &Disk{size: size, blocks: map[int64]*[blockSize]byte{}}
}

// Fork returns a disk with the same contents that can be written to.
func (d *Disk) Fork() *Disk {
	f := NewDisk(d.size)
	f.parent = d
	return f
}

// Size in bytes.
func (d *Disk) Size() int64 { return d.size }

// block returns a block to read from, nil for zeros.
func (d *Disk) block(n int64) *[blockSize]byte {
	for ; d != nil; d = d.parent {
		d.mu.RLock()
		b := d.blocks[n]
		d.mu.RUnlock()
		if b != nil {
			return b
		}
	}
	return nil
}

// read fills p from offset off. What is beyond the end reads as zeros.
func (d *Disk) read(p []byte, off int64) {
	for len(p) > 0 {
		at := off % blockSize
		n := min(int64(len(p)), blockSize-at)
		if b := d.block(off / blockSize); b != nil {
			copy(p[:n], b[at:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

// write puts p at offset off.
func (d *Disk) write(p []byte, off int64) {
	for len(p) > 0 {
		at := off % blockSize
		n := min(int64(len(p)), blockSize-at)
		b := new([blockSize]byte)
		if n < blockSize {
			if old := d.block(off / blockSize); old != nil {
				*b = *old
			}
		}
		copy(b[at:], p[:n])
		d.mu.Lock()
		d.blocks[off/blockSize] = b
		d.mu.Unlock()
		p, off = p[n:], off+n
	}
}
