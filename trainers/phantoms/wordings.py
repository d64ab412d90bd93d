# Copyright 2026 The CT-MoE authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Sentences of reports and wordings of questions, for `texts` to fill in.

Each is a pair: wordings of train and validation, and others, of the same words, of the test split.
"""

PHASE_SENTENCE = (
    ("The scan is in the {phase} phase.", "{phase} phase.", "The scan shows the {phase} phase."),
    ("Scan in the {phase} phase.", "The phase is {phase}."),
)
PRESENT = {
    "nodule": (
        (
            "{number} {noun} {of} {size} mm in {place}.",
            "There {some} {of} {size} mm in {place}.",
            "The lung shows {number} {noun} {of} {size} mm in {place}.",
        ),
        ("In {place} there {some} {of} {size} mm.",),
    ),
    "effusion": (
        (
            "{amount} pleural effusion on {side}, extent {extent} mm.",
            "There is pleural effusion on {side}, {amount} with an extent of {extent} mm.",
            "The scan shows a {amount} pleural effusion on {side}, extent {extent} mm.",
        ),
        ("On {side} there is pleural effusion, extent of {extent} mm.",),
    ),
    "consolidation": (
        (
            "Consolidation in {place}, extent {extent} mm.",
            "There is consolidation in {place} with an extent of {extent} mm.",
            "The scan shows consolidation in {place}, extent {extent} mm.",
        ),
        ("In {place} there is consolidation, extent of {extent} mm.",),
    ),
    "emphysema": (
        ("Emphysema in {place}.", "There is emphysema in {place}.", "The lung shows emphysema in {place}."),
        ("In {place} there is emphysema.",),
    ),
    "cardiomegaly": (
        (
            "Cardiomegaly, the heart measures {size} mm.",
            "The heart measures {size} mm, cardiomegaly.",
            "There is cardiomegaly, the size of the heart is {size} mm.",
        ),
        ("The heart measures {size} mm, there is cardiomegaly.",),
    ),
    "aneurysm": (
        (
            "Aortic aneurysm of {size} mm in {place}, extent {extent} mm.",
            "There is an aortic aneurysm in {place}, it measures {size} mm with an extent of {extent} mm.",
            "The scan shows an aortic aneurysm of {size} mm in {place}, extent {extent} mm.",
        ),
        ("In {place} there is an aortic aneurysm of {size} mm, extent of {extent} mm.",),
    ),
    "liver lesion": (
        (
            "{number} {noun} {of} {size} mm in {place}.",
            "There {some} {of} {size} mm in {place}.",
            "The scan shows {number} {noun} {of} {size} mm in {place}.",
        ),
        ("In {place} there {some} {of} {size} mm.",),
    ),
    "renal stone": (
        (
            "Renal stone of {size} mm in {place}.",
            "There is a renal stone in {place}, it measures {size} mm.",
            "The scan shows a renal stone in {place}, size {size} mm.",
        ),
        ("In {place} there is a renal stone of {size} mm.",),
    ),
    "ascites": (
        ("{amount} ascites.", "There is ascites, {amount}.", "The scan shows {amount} ascites."),
        ("There is {amount} ascites.",),
    ),
    "fracture": (
        (
            "Vertebral fracture in {place} with {loss} % height loss.",
            "There is a vertebral fracture in {place}, height loss {loss} %.",
            "The scan shows a vertebral fracture in {place}, {loss} % of height loss.",
        ),
        ("In {place} there is a vertebral fracture, {loss} % height loss.",),
    ),
}
# Of more than one, where that needs other words: they tell all the places, of which there may be two.
SEVERAL = {
    "liver lesion": (
        (
            "{number} liver lesions in {place}, the largest of {size} mm.",
            "There are liver lesions in {place}, the largest measures {size} mm.",
            "The scan shows {number} liver lesions in {place}, the largest of {size} mm.",
        ),
        ("In {place} there are liver lesions, the largest of {size} mm.",),
    ),
    "renal stone": (
        (
            "Renal stones in {place}, the largest of {size} mm.",
            "There are renal stones in {place}, the largest measures {size} mm.",
            "The scan shows renal stones in {place}, the largest of {size} mm.",
        ),
        ("In {place} there are renal stones, the largest of {size} mm.",),
    ),
    "fracture": (
        (
            "Vertebral fractures in {place}, the largest with {loss} % height loss.",
            "There are vertebral fractures in {place}, height loss of the largest {loss} %.",
            "The scan shows vertebral fractures in {place}, the largest with {loss} % of height loss.",
        ),
        ("In {place} there are vertebral fractures, the largest of {loss} % height loss.",),
    ),
}
# They follow the sentence of the finding that they are about.
WIDTHS = (
    (
        "It measures {lower} mm across at its lower end, {middle} mm in the middle and {upper} mm at its upper end.",
        "From its lower to its upper end it measures {lower}, {middle} and {upper} mm across.",
        "Across it measures {lower} mm at the lower end, {middle} mm in the middle and {upper} mm at the upper end.",
    ),
    ("At its lower end it measures {lower} mm across, in the middle {middle} mm and at its upper end {upper} mm.",),
)
GROWTH = (
    (
        "It widens {direction}.",
        "The direction in which it widens: {direction}.",
        "Along the body it widens {direction}.",
    ),
    ("It does widen {direction}.",),
)
LEVEL = (
    ("It is in the {level} of the scan.", "It lies in the {level} of the scan.", "Level: {level} of the scan."),
    ("The level of it is the {level} of the scan.",),
)
ABSENT = (
    ("No {finding}.", "There is no {finding}.", "There is no sign of {finding}."),
    ("The scan shows no {finding}.",),
)
IMPRESSION = (
    ("{listed}.", "In summary, {listed}.", "The scan shows {listed}."),
    ("In summary, the scan shows {listed}.", "It shows {listed}."),
)
NORMAL = (("No abnormality.", "The scan shows no abnormality."), ("There is no abnormality.",))
QUESTIONS = {
    "phase": (
        (
            "What is the phase of the scan?",
            "In which phase is the scan?",
            "Which phase does the scan show?",
            "Which is the phase of contrast?",
            "What phase of contrast is there?",
            "Tell the phase of the scan.",
            "Is the scan in the non-contrast, arterial, portal venous or delayed phase?",
            "The phase of the scan?",
        ),
        (
            "Which is the phase of the scan?",
            "What phase does the scan show?",
            "In what phase of contrast is the scan?",
        ),
    ),
    "organ": (
        (
            "Which organ is abnormal?",
            "Which of the organs is abnormal?",
            "What organ shows an abnormality?",
            "In which organ is there an abnormality?",
            "Where in the scan is an organ abnormal?",
            "Tell the organ with an abnormality.",
            "Which of the organs is not normal?",
            "The abnormal organ?",
        ),
        ("Which organ shows an abnormality?", "What is the abnormal organ?", "Which organ is not normal?"),
    ),
    "abnormality": (
        (
            "Which abnormality is there?",
            "What abnormality does the scan show?",
            "What is abnormal in the scan?",
            "Which of the findings is in the scan?",
            "What finding is there?",
            "Tell the abnormality in the scan.",
            "Is there an abnormality, and which?",
            "The abnormality of the scan?",
        ),
        ("Which abnormality does the scan show?", "What abnormality is in the scan?", "What is the finding?"),
    ),
    "presence": (
        (
            "Is there {finding}?",
            "Does the scan show {finding}?",
            "Is there {finding} in the scan?",
            "Does the scan show {finding} or not?",
            "Can {finding} be seen?",
            "Is {finding} there?",
            "Tell if there is {finding}.",
            "In the scan, is there {finding}?",
        ),
        ("Does {finding} show in the scan?", "Is {finding} in the scan?", "Is {finding} seen or not?"),
    ),
    "where": (
        (
            "Where is the {finding}?",
            "In which place is the {finding}?",
            "Which place does the {finding} lie in?",
            "Where in the scan is the {finding}?",
            "Where can the {finding} be seen?",
            "Tell the place of the {finding}.",
            "What is the place of the {finding}?",
            "The {finding} is in which place?",
        ),
        (
            "In which place does the {finding} lie?",
            "Where does the {finding} lie?",
            "Which is the place of the {finding}?",
        ),
    ),
    "size": (
        (
            "How large is the largest {finding}?",
            "What is the size of the largest {finding}?",
            "How many mm does the largest {finding} measure?",
            "Tell the size of the largest {finding}.",
            "What does the largest {finding} measure?",
            "The size of the largest {finding}?",
        ),
        ("What size is the largest {finding}?", "How many mm is the largest {finding}?"),
    ),
    "extent": (
        (
            "What is the extent of the {finding} along the body?",
            "How long is the {finding} along the body?",
            "What is the extent from head to feet of the {finding}?",
            "How many mm long is the {finding}?",
            "Tell the extent of the {finding} along the body.",
            "How long does the {finding} extend from head to feet?",
            "Along the body, how long is the {finding}?",
            "What length does the {finding} have along the body?",
        ),
        (
            "How long is the {finding} from head to feet?",
            "What is the extent along the body of the {finding}?",
            "What is the length of the {finding} from head to feet?",
        ),
    ),
    "count": (
        (
            "How many {finding} are there?",
            "What is the number of {finding}?",
            "How many {finding} does the scan show?",
            "How many {finding} can be seen?",
            "Tell the number of {finding}.",
            "The scan shows how many {finding}?",
            "In the scan, how many {finding} are there?",
            "Which number of {finding} does the scan show?",
        ),
        ("How many {finding} are in the scan?", "Which is the number of {finding}?", "How many {finding} are seen?"),
    ),
    "level": (
        (
            "At which level of the scan is the {finding}?",
            "Which level of the scan shows the {finding}?",
            "What is the level of the {finding}?",
            "In which quarter of the scan is the {finding}?",
            "Tell the level of the {finding} in the scan.",
            "Which quarter of the scan does the {finding} lie in?",
            "At what level can the {finding} be seen?",
            "The level of the {finding}?",
        ),
        (
            "At what level of the scan does the {finding} lie?",
            "Which is the level of the {finding} in the scan?",
            "What quarter of the scan shows the {finding}?",
        ),
    ),
    "growth": (
        (
            "Where does the {finding} widen?",
            "In which direction does the {finding} widen?",
            "Towards which end does the {finding} widen?",
            "What is the direction in which the {finding} widens?",
            "Tell the direction in which the {finding} widens.",
            "Does the {finding} widen, and where?",
            "The {finding} widens in which direction?",
            "Along the body, where does the {finding} widen?",
        ),
        (
            "Which is the direction in which the {finding} does widen?",
            "What direction does the {finding} widen in?",
            "Where along the body does the {finding} widen?",
        ),
    ),
    "width": (
        (
            "How wide is the {finding} at its {end}?",
            "What is the width of the {finding} at its {end}?",
            "How many mm does the {finding} measure across at its {end}?",
            "Tell the width of the {finding} at its {end}.",
            "What does the {finding} measure across at its {end}?",
            "At its {end}, how wide is the {finding}?",
        ),
        (
            "Which width does the {finding} have at its {end}?",
            "At its {end}, what does the {finding} measure across?",
            "How many mm wide is the {finding} at its {end}?",
        ),
    ),
    "plane": (
        (
            "What is the plane of the slices?",
            "In which plane are the slices?",
            "Which plane do the slices show?",
            "Tell the plane of the slices.",
        ),
        ("Which is the plane of the slices?", "In what plane are the slices?"),
    ),
}
