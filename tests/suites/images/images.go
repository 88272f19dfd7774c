// Package images replaces the list of images in containerd's tests: it names those of the registry that
// `./task test-suites` serves, which listens on the address and port below.
package images

import "os"

const registry = "127.0.0.1:5000/"

// The images that tests of the client use.
const (
	None = iota
	BusyBox
	BusyBoxByDigest
	Pause
	VolumeCopyUp
	VolumeOwnership
)

// Get returns the reference of an image.
func Get(image int) string {
	switch image {
	case BusyBox:
		return registry + "busybox:1"
	case BusyBoxByDigest:
		return registry + "busybox@" + os.Getenv("HUSK_SUITES_BUSYBOX")
	case Pause:
		return registry + "platforms:1"
	case VolumeCopyUp:
		return registry + "layers:1"
	case VolumeOwnership:
		return registry + "setuid:1"
	}
	panic("no such image")
}
